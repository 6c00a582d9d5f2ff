"""What evaluate.py prints, draws and writes."""
