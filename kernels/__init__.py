"""Pure functions on tensors: every op has one numeric contract, a torch reference and faster implementations."""
