UNUSABLE = frozenset({"empty", "refusal", "repetition", "invalid_json", "language"})
