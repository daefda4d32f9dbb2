"""`loramux top`: what workers do now, read from their `/metrics`.

snapshot   a page, parsed
change     what happened between two pages, of one worker or of several
tables     the rows that are shown
screen     the terminal
"""
