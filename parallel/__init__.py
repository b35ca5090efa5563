"""The same maths over several ranks: process groups, collectives, sharded linears and expert dispatch."""
