"""The verbs: one file each. Its first class is what the user may write, its last functions are what happens."""
