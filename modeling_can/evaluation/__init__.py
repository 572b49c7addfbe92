"""How good an encoder is: a file for each protocol."""
