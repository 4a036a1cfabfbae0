"""How much computation does a token get?"""
