"""`tuna proxy`: the tags of a store for any model that is served today, in front of its own server.

apis.py      where pictures and texts stand in a request of chat completions, responses, messages
lookup.py    pictures -> the store's answers, within a deadline
tagger.py    a request -> the same request with tags, or untouched and why
server.py    forwards everything, byte for byte
"""
