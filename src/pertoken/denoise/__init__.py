"""When is a position committed, when refreshed?"""
