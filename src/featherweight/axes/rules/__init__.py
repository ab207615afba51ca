"""What each operator does with the channels that it reads: one table, an entry an operator."""
