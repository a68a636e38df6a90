DEFAULT_FOLDER = "~/.cache/datakit/models"
