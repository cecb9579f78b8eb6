"""How a benchmark reports: numbers as JSON, pictures, tables on the terminal, tracking, and measures of agreement."""
