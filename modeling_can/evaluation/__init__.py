"""How good an encoder is: labelled sets, features of them, and a file for each protocol."""
