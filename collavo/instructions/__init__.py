"""Write crayon instructions: questions and answers in English about an image's segments.

`write`       the six tasks
`phrasebook`  the phrasings, from a JSON file that a user can replace
`choose`      choose phrasings and absent classes by hash, so that data depend on no order or machine
`text`        write object lists and boxes as text, and read them back
`english`     how a class is called: one of it, several, with which article
"""
