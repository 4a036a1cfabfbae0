"""Grammars: what may the next token be? See README.md here."""
