"""Which tokens does it read?"""
