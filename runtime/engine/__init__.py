"""The engine of one rank: step loop, model runner, output."""
