"""Solutions of the exercises of notebook 5. Each block is what a student writes into one cell."""

# %% 5.1
padding_share = {
    "file order": 40 / 140,  # rectangles of 80 and 60 tokens
    "sorted": 20 / 120,  # 40 and 30 together, 20 and 10 together: 80 and 40 tokens
}


# %% 5.2
def allowed(prefix: str, codes: list[str]) -> set[str]:
    """The characters that may follow the prefix; "<" where the prefix is a whole code."""
    characters = set()
    for code in codes:
        if code == prefix:
            characters.add("<")
        elif code.startswith(prefix):
            characters.add(code[len(prefix)])
    return characters
