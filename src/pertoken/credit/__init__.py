"""How much does it teach?"""
