"""What runs, replay, evaluate and lab share: figures of one look, intervals, paired differences, tables."""
