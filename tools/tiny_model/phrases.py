"""The wordings of each question: those trained on, and those that only evaluation uses.

Fields in braces are filled in by `say`; {colour} and {picture} are spelt at random.
"""

from __future__ import annotations

import random
from typing import NamedTuple


class Phrases(NamedTuple):
    trained: tuple[str, ...]
    held_out: tuple[str, ...]


PHRASES = {
    # one thing
    "shape": Phrases(
        (
            "Tell me what shape it is.",
            "What shape is it?",
            "What shape is in the {picture}?",
            "What shape is this?",
            "Which shape do you see?",
            "Name the shape.",
            "What kind of shape is it?",
        ),
        ("Which shape is in this {picture}?",),
    ),
    "colour": Phrases(
        ("What {colour} is it?", "What {colour} is the shape?", "Which {colour} is it?", "What {colour} is this shape?", "Name the {colour}."),
        ("Tell me what {colour} it is.", "Which {colour} is this shape?"),
    ),
    "what": Phrases(
        ("Tell me what this is.", "What is this?", "What is it?", "What do you see here?", "What is shown?", "What does the {picture} show?"),
        ("What do we see here?",),
    ),
    # by what is known of it
    "shape of color": Phrases(
        (
            "What shape is {color}?",
            "Which shape is {color}?",
            "What shape is the {color} one?",
            "What is the shape of the {color} one?",
            "What is {color}?",
        ),
        ("Tell me what shape is {color}.", "Which shape is the {color} one?"),
    ),
    "shape at": Phrases(("What shape is {where}?", "Which shape is {where}?", "Name the shape {where}."), ("Tell me what shape is {where}.",)),
    "colour of shape": Phrases(
        (
            "Tell me what {colour} the {name} is.",
            "What {colour} is the {name}?",
            "Which {colour} is the {name}?",
            "What {colour} does the {name} have?",
            "What is the {colour} of the {name}?",
        ),
        ("Which {colour} does the {name} have?",),
    ),
    "colour at": Phrases(("What {colour} is the shape {where}?", "Which {colour} is the one {where}?"), ("What {colour} is the one {where}?",)),
    "where": Phrases(
        ("Where is the {name}?", "Where do you see the {name}?", "In which place is the {name}?", "Where in the {picture} is the {name}?"),
        ("Tell me where the {name} is.", "In which place do you see the {name}?"),
    ),
    "at": Phrases(
        ("What is {where}?", "What do you see {where}?", "Is there something {where}? What is it?", "What stands {where}?"),
        ("Tell me what is {where}.",),
    ),
    "size": Phrases(
        ("Is the {name} small or large?", "What size is the {name}?", "How large is the {name}?", "Is the {name} large or small?"),
        ("Tell me what size the {name} is.", "What size does the {name} have?"),
    ),
    "largest": Phrases(
        ("Which shape is the largest?", "What is the largest shape?", "Which one is the largest?", "Which is the biggest shape?"),
        ("Tell me which shape is the largest.", "What is the biggest shape?"),
    ),
    "smallest": Phrases(
        ("Which shape is the smallest?", "What is the smallest shape?", "Which one is the smallest?"), ("Tell me which shape is the smallest.",)
    ),
    "relation": Phrases(
        ("Is the {name} {relation} the {other}?", "Does the {name} stand {relation} the {other}?"), ("Do you see the {name} {relation} the {other}?",)
    ),
    # all of them
    "count": Phrases(
        (
            "Tell me how many shapes there are.",
            "How many shapes are there?",
            "How many shapes are in the {picture}?",
            "How many shapes do you see?",
            "Count the shapes.",
            "What is the number of shapes?",
        ),
        ("How many shapes does the {picture} show?",),
    ),
    "count of": Phrases(
        ("How many {name} are there?", "How many {name} do you see?", "How many {name} are in the {picture}?", "Count the {name}."),
        ("Tell me how many {name} there are.", "How many {name} does the {picture} show?"),
    ),
    "exists": Phrases(
        ("Is there {name}?", "Do you see {name}?", "Is there {name} in the {picture}?", "Does the {picture} show {name}?"),
        ("Tell me: is there {name}?", "Can you see {name} in the {picture}?"),
    ),
    "describe": Phrases(
        (
            "Tell me what is in the {picture}.",
            "Describe the {picture}.",
            "What do you see?",
            "What is in the {picture}?",
            "What is in this {picture}?",
            "Please describe this {picture}.",
            "What can you see in the {picture}?",
        ),
        ("Describe what you see.",),
    ),
    # follow-ups
    "other": Phrases(
        ("And the other one?", "What about the other one?", "And the other shape?", "And the second one?", "How about the other one?"),
        ("And what about the other shape?", "What about the other shape?"),
    ),
    "and name": Phrases(("And the {name}?", "What about the {name}?", "How about the {name}?"), ("And what about the {name}?",)),
    "where it": Phrases(("Where is it?", "And where is it?", "In which place is it?"), ("And in which place is it?",)),
    "colour it": Phrases(("What {colour} is it?", "And what {colour} is it?", "And its {colour}?"), ("And which {colour} is it?",)),
    "shape it": Phrases(("What shape is it?", "And what shape is it?", "And its shape?"), ("And which shape is it?",)),
    "this one": Phrases(("And this one?", "What about this one?", "And here?"), ("And what about this one?",)),
    # print
    "number": Phrases(
        (
            "Tell me what number is shown.",
            "What number is shown?",
            "What number is in the {picture}?",
            "Which number do you see?",
            "Read the number.",
            "What number is this?",
        ),
        ("Which number is in the {picture}?",),
    ),
    "word": Phrases(
        (
            "Tell me what word is shown.",
            "What word is shown?",
            "What word is in the {picture}?",
            "Read the word.",
            "What does it say?",
            "Which word do you see?",
            "Read the text.",
        ),
        ("What does the {picture} say?",),
    ),
    "colour of print": Phrases(("What {colour} is the {name}?", "Which {colour} does the {name} have?"), ("Tell me what {colour} the {name} is.",)),
    # clothing and emoji
    "clothes": Phrases(
        ("What kind of clothing is this?", "What piece of clothing is shown?", "What clothing do you see?", "Name the clothing."),
        ("Tell me what kind of clothing this is.", "Which clothing is shown?"),
    ),
    "emoji": Phrases(
        (
            "Tell me what emoji this is.",
            "What emoji is this?",
            "Which emoji is shown?",
            "What is in the emoji?",
            "What does the emoji show?",
            "Name the emoji.",
        ),
        ("Which emoji do you see?",),
    ),
    # charts
    "highest": Phrases(
        (
            "Tell me which bar is the highest.",
            "Which bar is the highest?",
            "What bar is the highest?",
            "Which bar is the tallest?",
            "Which is the highest bar?",
            "Which {colour} has the highest bar?",
        ),
        ("Which is the tallest bar?",),
    ),
    "lowest": Phrases(
        ("Which bar is the lowest?", "What bar is the lowest?", "Which bar is the shortest?", "Which is the lowest bar?"),
        ("Tell me which bar is the lowest.", "Which is the shortest bar?"),
    ),
    "bars": Phrases(("How many bars are there?", "How many bars does the chart have?", "Count the bars."), ("Tell me how many bars there are.",)),
    "higher": Phrases(
        ("Is the {name} bar higher than the {other} bar?", "Is the {name} bar taller than the {other} one?"),
        ("Is the {name} one higher than the {other} one?",),
    ),
    # several pictures
    "more": Phrases(
        ("Which {picture} has more shapes?", "Which {picture} shows more shapes?", "In which {picture} are there more shapes?"),
        ("Tell me which {picture} has more shapes.",),
    ),
    "fewer": Phrases(("Which {picture} has fewer shapes?", "Which {picture} shows fewer shapes?"), ("In which {picture} are there fewer shapes?",)),
    "most": Phrases(
        ("Which {picture} has the most shapes?", "Which {picture} shows the most shapes?"), ("Tell me which {picture} has the most shapes.",)
    ),
    "changed": Phrases(
        (
            "Tell me what changed.",
            "What changed?",
            "What is different?",
            "What has changed?",
            "What changed from the first {picture} to the second?",
            "What is the difference?",
        ),
        ("What is different in the second {picture}?",),
    ),
    "same": Phrases(
        ("Are the {picture}s the same?", "Do both {picture}s show the same?", "Are the two {picture}s equal?"), ("Are both {picture}s the same?",)
    ),
    "which shows": Phrases(
        ("Which {picture} shows {name}?", "In which {picture} is {name}?", "Which {picture} has {name}?", "In which {picture} do you see {name}?"),
        ("Tell me which {picture} shows {name}.",),
    ),
    "shape in nth": Phrases(
        ("What shape is in the {nth} {picture}?", "Which shape does the {nth} {picture} show?"), ("Tell me what shape is in the {nth} {picture}.",)
    ),
    "colour in nth": Phrases(
        ("What {colour} is the shape in the {nth} {picture}?", "Which {colour} does the shape in the {nth} {picture} have?"),
        ("Tell me what {colour} the shape in the {nth} {picture} is.",),
    ),
    "what in nth": Phrases(
        ("What is in the {nth} {picture}?", "Describe the {nth} {picture}.", "What does the {nth} {picture} show?"),
        ("Tell me what is in the {nth} {picture}.", "What do you see in the {nth} {picture}?"),
    ),
    # videos
    "direction": Phrases(
        ("Which way does it move?", "In which direction does the {name} move?", "Which way does the {name} move?", "Where does the {name} go?"),
        ("Tell me which way the {name} moves.", "In which direction does it go?"),
    ),
    "moves": Phrases(("Tell me what moves.", "What moves?", "Which shape moves?", "What is moving?"), ("Which shape is moving?",)),
    "first": Phrases(
        ("What appears first?", "Which shape appears first?", "What comes first?"), ("Tell me what appears first.", "Which shape comes first?")
    ),
    "last": Phrases(
        ("What appears last?", "Which shape appears last?", "What comes last?"), ("Tell me what appears last.", "Which shape comes last?")
    ),
    "order": Phrases(
        ("In which order do the shapes appear?", "In what order do they appear?", "What is the order of the shapes?"),
        ("Tell me the order of the shapes.",),
    ),
    "happens": Phrases(
        ("Tell me what happens.", "What happens in the video?", "What happens?", "Describe the video.", "What do you see in the video?"),
        ("What happens in this video?",),
    ),
    # JSON
    "json": Phrases(
        (
            "Describe the {picture} as JSON.",
            "Describe the {picture} in JSON.",
            "List the shapes as JSON.",
            "What is in the {picture}? Answer in JSON.",
        ),
        ("List the shapes in JSON.", "What do you see? Answer as JSON."),
    ),
    "as json": Phrases(
        ("{question} Answer in JSON.", "{question} Answer as JSON.", "{question} Reply with JSON."),
        ("{question} Reply as JSON.", "Answer in JSON: {question}"),
    ),
    # Chinese
    "zh shape": Phrases(("这是什么形状？", "图中是什么形状？", "图片里有什么形状？", "是什么形状？"), ("图片里是什么形状？", "图中有什么形状？")),
    "zh colour": Phrases(("它是什么颜色？", "这个图形是什么颜色？", "是什么颜色？"), ("图中是什么颜色？", "这是什么颜色？")),
    "zh colour of": Phrases(("{name}是什么颜色？", "{name}的颜色是什么？"), ("图中的{name}是什么颜色？",)),
    "zh shape of": Phrases(("{color}的是什么形状？", "什么形状是{color}的？"), ("{color}的图形是什么形状？",)),
    "zh count": Phrases(
        ("有几个图形？", "图中有几个图形？", "图片里有多少个图形？", "一共有几个图形？"), ("图片里有几个图形？", "一共有多少个图形？")
    ),
    "zh where": Phrases(("{name}在哪里？", "{name}在什么位置？"), ("图中的{name}在哪里？",)),
    "zh exists": Phrases(("有{name}吗？", "图中有{name}吗？", "图片里有没有{name}？"), ("图片里有{name}吗？",)),
    "zh describe": Phrases(("描述这张图片。", "你看到了什么？", "图片里有什么？", "图中有什么？"), ("请描述这张图片。", "图里有什么？")),
    "zh number": Phrases(("这是什么数字？", "图中的数字是多少？", "图片里是什么数字？"), ("图中是什么数字？",)),
}


def say(key: str, rng: random.Random, held_out: bool, **fields: str) -> str:
    phrases = PHRASES[key]
    text = rng.choice(phrases.held_out if held_out else phrases.trained)
    fields.setdefault("colour", rng.choice(("color", "color", "colour")))
    fields.setdefault("picture", rng.choice(("picture", "image")))
    return text.format(**fields)


def loosely(text: str, rng: random.Random) -> str:
    """The same as people type it: now and then without its capital or its last mark, or with a word of courtesy."""
    kind = rng.random()
    if not text.isascii() or kind > 0.3:
        return text
    if kind < 0.1:
        return text[0].lower() + text[1:]
    if kind < 0.2:
        return text[0].lower() + text[1:].rstrip("?.")
    if kind < 0.25:
        return f"{rng.choice(('Please', 'Hi', 'Hello', 'Now', 'OK', 'Tell me', 'Question'))}{rng.choice((',', ':'))} {text[0].lower()}{text[1:]}"
    return f"{text} {rng.choice(('Please.', 'Thank you.', 'Answer briefly.', 'Look closely.'))}"
