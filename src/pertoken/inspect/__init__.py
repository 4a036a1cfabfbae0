"""What does it do inside?"""
