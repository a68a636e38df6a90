"""What a child process does to one video: analyse it, score its clips again, sample frames, cut."""
