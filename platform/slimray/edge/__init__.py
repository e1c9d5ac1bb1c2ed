"""The device's side: what a network costs, and later how it is made small and shipped."""
