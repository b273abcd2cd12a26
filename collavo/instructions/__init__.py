"""Crayon instructions: segments in, questions and answers in English out.

`text`        one serializer for object lists and boxes, one strict parser that reads them back
`phrasebook`  the phrasings, out of a JSON file that a user can replace
`choose`      which absent classes to ask for, and which phrasing: by hash, so that data depend on no order or machine
`write`       the six tasks
"""
