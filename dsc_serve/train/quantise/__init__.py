"""`dsc-serve quantize`: weights of a checkpoint in 4 and 8 bits, what that costs, and what makes up for it."""
