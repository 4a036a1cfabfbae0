"""Is it worth a place in the context?"""
