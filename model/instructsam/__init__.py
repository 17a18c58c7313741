"""InstructSAM: count with a language model, propose masks, give them labels so that the counts hold."""
