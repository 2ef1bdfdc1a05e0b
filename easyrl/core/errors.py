"""The one exception a user is meant to see."""


class UserError(Exception):
    """Something the user can put right, said in one line.

    The message names the flag, file and row, what was found and what was expected. Scripts print it as
    `easyrl: error: <message>` without a traceback and exit with status 2 (`easyrl.core.config.run`).
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
