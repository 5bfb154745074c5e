"""What a run will cost, before it is made: from a resolved configuration to figures on the meta device."""
