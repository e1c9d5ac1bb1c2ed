"""Networks of text: translation (transformer.py, hat.py), language models (micronet.py), and how both are decoded."""
