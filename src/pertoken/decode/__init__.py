"""How is the next token chosen, how far is guessed ahead, what may it be?"""
