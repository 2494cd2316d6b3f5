"""From texts, instructions and token ids to rows that train, packed or padded."""
