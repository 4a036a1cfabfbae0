"""Does it stay, merge or leave?"""
