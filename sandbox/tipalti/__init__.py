"""A stateful stand-in for Tipalti: payees, payment batches, and payments whose states move with its clock."""
