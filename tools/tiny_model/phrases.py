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
            "Can you name the shape?",
            "Say what shape is shown.",
            "Which shape is shown in the {picture}?",
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
        (
            "Say what {colour} it is.",
            "Tell me the {colour}.",
            "Which {colour} does it have?",
            "What {colour} is it?",
            "What {colour} is the shape?",
            "Which {colour} is it?",
            "What {colour} is this shape?",
            "Name the {colour}.",
        ),
        ("Tell me what {colour} it is.", "Which {colour} is this shape?"),
    ),
    "what": Phrases(
        (
            "What am I looking at?",
            "What do we have here?",
            "Say what you see here.",
            "Can you tell me what it is?",
            "Tell me what this is.",
            "What is this?",
            "What is it?",
            "What do you see here?",
            "What is shown?",
            "What does the {picture} show?",
        ),
        ("What do we see here?",),
    ),
    # by what is known of it
    "shape of color": Phrases(
        (
            "Tell me which shape is {color}.",
            "Say what is {color}.",
            "Which of them is {color}?",
            "Which of these is {color}?",
            "Which one of these shapes is {color}?",
            "Among the shapes, which one is {color}?",
            "Look at the shapes: which one is {color}?",
            "What is the {color} one of the shapes?",
            "What kind of shape is {color}?",
            "Which one is {color}?",
            "What shape is {color}?",
            "Which shape is {color}?",
            "What shape is the {color} one?",
            "What is the shape of the {color} one?",
            "What is {color}?",
        ),
        ("Which of the shapes is {color}?", "Which shape is the {color} one?"),
    ),
    "shape at": Phrases(
        (
            "Tell me the shape {where}.",
            "Say what shape stands {where}.",
            "What shape is {where}?",
            "Which shape is {where}?",
            "Name the shape {where}.",
        ),
        ("Which shape stands {where}?",),
    ),
    "colour of shape": Phrases(
        (
            "Tell me what {colour} the {name} is.",
            "What {colour} is the {name}?",
            "Which {colour} is the {name}?",
            "What {colour} does the {name} have?",
            "What is the {colour} of the {name}?",
        ),
        ("Say which {colour} the {name} has.",),
    ),
    "colour at": Phrases(
        (
            "Tell me the {colour} of the shape {where}.",
            "What {colour} is the thing {where}?",
            "Say what {colour} the shape {where} is.",
            "What {colour} is the shape {where}?",
            "Which {colour} is the one {where}?",
        ),
        ("What {colour} is the one {where}?",),
    ),
    "where": Phrases(
        (
            "Tell me where you see the {name}.",
            "Say where the {name} is.",
            "Where can I find the {name}?",
            "At which place is the {name}?",
            "Where is the {name}?",
            "Where do you see the {name}?",
            "In which place is the {name}?",
            "Where in the {picture} is the {name}?",
        ),
        ("Tell me where the {name} is.", "In which place do you see the {name}?"),
    ),
    "at": Phrases(
        (
            "Tell me what stands {where}.",
            "Say what is {where}.",
            "What can be found {where}?",
            "What is to be seen {where}?",
            "What can you find {where}?",
            "What can you see {where}?",
            "Tell me what you see {where}.",
            "Which thing is {where}?",
            "What is {where}?",
            "What do you see {where}?",
            "Is there something {where}? What is it?",
            "What stands {where}?",
        ),
        ("What can be seen {where}?",),
    ),
    "size": Phrases(
        (
            "Tell me how large the {name} is.",
            "Say whether the {name} is small or large.",
            "What is the size of the {name}?",
            "Is the {name} small or large?",
            "What size is the {name}?",
            "How large is the {name}?",
            "Is the {name} large or small?",
        ),
        ("Tell me what size the {name} is.", "What size does the {name} have?"),
    ),
    "largest": Phrases(
        (
            "Tell me which one is the largest.",
            "Say which shape is the biggest.",
            "What is the largest one?",
            "Which shape is the largest?",
            "What is the largest shape?",
            "Which one is the largest?",
            "Which of them is the largest?",
            "Which of these is the biggest?",
            "Which one of these shapes is the largest?",
            "Among the shapes, which one is the largest?",
            "Which is the biggest shape?",
        ),
        ("Which of the shapes is the largest?", "What is the biggest shape?"),
    ),
    "smallest": Phrases(
        (
            "Tell me the smallest shape.",
            "Say which one is the smallest.",
            "What is the smallest one?",
            "Which shape is the smallest?",
            "What is the smallest shape?",
            "Which one is the smallest?",
            "Which of them is the smallest?",
            "Which of these is the smallest?",
            "Which one of these shapes is the smallest?",
        ),
        ("Which of the shapes is the smallest?",),
    ),
    "relation": Phrases(
        (
            "Do you see the {name} standing {relation} the {other}?",
            "Tell me whether the {name} is {relation} the {other}.",
            "Is it true that the {name} is {relation} the {other}?",
            "Is the {name} {relation} the {other}?",
            "Does the {name} stand {relation} the {other}?",
        ),
        ("Do you see the {name} {relation} the {other}?",),
    ),
    # all of them
    "count": Phrases(
        (
            "Say how many shapes you see.",
            "How many shapes can you count?",
            "Give the number of shapes.",
            "How many shapes does it show?",
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
        (
            "Say how many {name} there are.",
            "Tell me the number of {name}.",
            "How many {name} can you see?",
            "How many {name} are there?",
            "How many {name} do you see?",
            "How many {name} are in the {picture}?",
            "Count the {name}.",
        ),
        ("Tell me how many {name} you can see.", "How many {name} does the {picture} show?"),
    ),
    "exists": Phrases(
        (
            "Can you see {name}?",
            "Tell me whether there is {name}.",
            "Is {name} in the {picture}?",
            "Is there {name}?",
            "Do you see {name}?",
            "Is there {name} in the {picture}?",
            "Does the {picture} show {name}?",
            "Can we find {name} here?",
            "Do they show {name}?",
        ),
        ("Do we see {name}?", "Can you see {name} in the {picture}?"),
    ),
    "describe": Phrases(
        (
            "Describe it.",
            "Describe what is shown.",
            "Say what you see.",
            "Give a description of the {picture}.",
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
    # about a thing that is there, what the model was not taught to tell
    "unknown of it": Phrases(
        (
            "How heavy is the {name}?",
            "How much does the {name} weigh?",
            "What is the {name} made of?",
            "How old is the {name}?",
            "Who drew the {name}?",
            "Who made this {picture}?",
            "When was the {picture} made?",
            "How much does the {name} cost?",
            "Where can I buy the {name}?",
            "Is the {name} happy?",
            "Is the {name} angry?",
            "Is the {name} dangerous?",
            "Is the {name} warm?",
            "Is the {name} beautiful?",
            "Is the {name} hard or soft?",
            "Is the {name} old or new?",
            "Can I eat the {name}?",
            "Does the {name} like me?",
            "Do you like the {name}?",
            "Do you know who drew the {name}?",
            "What does the {name} mean?",
            "What does the {name} think?",
            "What does the {name} smell like?",
            "What is the {name} for?",
            "What is behind the {name}?",
            "What is inside the {name}?",
            "What is the area of the {name}?",
            "Why is there a {shape}?",
            "How many corners does the {name} have?",
            "How many sides does the {name} have?",
            "How fast is the {name}?",
            "How wide is the {name} in meters?",
            "What {colour} is the background?",
            "What is in the background?",
            "Is the background dark?",
            "Tell me the price of the {name}.",
            "What is the age of the {name}?",
            "What is the height of the {name}?",
            "What is the price of the {name}?",
            "What is the temperature of the {name}?",
            "Which animal lives in the {name}?",
            "Which brand is the {name}?",
            "What does the {name} say?",
            "What would you do with the {name}?",
            "What is the {noun} of the {name}?",
            "Tell me the {noun} of the {name}.",
            "Say what the {noun} of the {name} is.",
            "Which {noun} does the {name} have?",
            "What {noun} does the {name} have?",
            "Does the {name} have any {noun}?",
            "How {adjective} is the {name}?",
            "Is the {name} {adjective}?",
            "Do you think that the {name} is {adjective}?",
            "Why is the {name} so {adjective}?",
            "Can the {name} {verb}?",
            "Does the {name} {verb}?",
            "What does the {name} {verb}?",
            "When does the {name} {verb}?",
            "Why does the {name} {verb}?",
            "How does the {name} {verb}?",
            "Say how heavy the {name} is.",
        ),
        (
            "What is the weight of the {name}?",
            "Which material is the {name} made of?",
            "Is the {name} sad?",
            "How many edges does the {name} have?",
            "How warm is the {name}?",
            "What would the {name} say?",
            "Which {colour} is the background?",
        ),
    ),
    # follow-ups
    "other": Phrases(
        (
            "And the other thing?",
            "What about the other thing?",
            "And what about the other one?",
            "And the other one?",
            "What about the other one?",
            "And the other shape?",
            "And the second one?",
            "How about the other one?",
        ),
        ("And what about the other shape?", "What about the other shape?"),
    ),
    "and name": Phrases(
        (
            "And what is with the {name}?",
            "And what of the {name}?",
            "And the {name}?",
            "What about the {name}?",
            "How about the {name}?",
        ),
        ("And how about the {name}?",),
    ),
    "where it": Phrases(
        (
            "And in what place?",
            "Where does it stand?",
            "Where is it?",
            "And where is it?",
            "In which place is it?",
        ),
        ("And in which place is it?",),
    ),
    "colour it": Phrases(
        (
            "And what is its {colour}?",
            "Which {colour} is it?",
            "What {colour} is it?",
            "And what {colour} is it?",
            "And its {colour}?",
        ),
        ("And which {colour} is it?",),
    ),
    "shape it": Phrases(
        (
            "Which shape is it?",
            "And what is its shape?",
            "What shape is it?",
            "And what shape is it?",
            "And its shape?",
        ),
        ("And which shape is it?",),
    ),
    "this one": Phrases(
        ("And what about this?", "And in this one?", "And this one?", "What about this one?", "And here?"),
        ("And what about this one?",),
    ),
    # print
    "number": Phrases(
        (
            "Say which number is in the {picture}.",
            "Tell me the number.",
            "Which number is shown?",
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
            "Say which word is shown.",
            "Tell me the word.",
            "What does the word say?",
            "What does the text in the {picture} say?",
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
    "colour of print": Phrases(
        (
            "Tell me the {colour} of the {name}.",
            "Say what {colour} the {name} is.",
            "What {colour} is the {name}?",
            "Which {colour} does the {name} have?",
        ),
        ("Say which {colour} the {name} has.",),
    ),
    # clothing and emoji
    "clothes": Phrases(
        (
            "Tell me what clothing is shown.",
            "Which piece of clothing is this?",
            "Say what clothing it is.",
            "Which kind of clothing do you see?",
            "What kind of clothing is this?",
            "What piece of clothing is shown?",
            "What clothing do you see?",
            "Name the clothing.",
        ),
        ("Tell me what kind of clothing this is.", "Which clothing is shown?"),
    ),
    "emoji": Phrases(
        (
            "Say which emoji it is.",
            "Tell me the emoji.",
            "What emoji do you see?",
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
            "Say which bar is the tallest.",
            "What is the highest bar?",
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
        (
            "Tell me which bar is the shortest.",
            "Say which bar is the lowest.",
            "What is the lowest bar?",
            "What is the shortest bar?",
            "Which bar is the lowest?",
            "What bar is the lowest?",
            "Which bar is the shortest?",
            "Which is the lowest bar?",
        ),
        ("Which is the shortest bar?",),
    ),
    "bars": Phrases(
        (
            "Tell me the number of bars.",
            "Say how many bars there are.",
            "How many bars are there?",
            "How many bars does the chart have?",
            "Count the bars.",
        ),
        ("Tell me how many bars there are.",),
    ),
    "higher": Phrases(
        (
            "Is the {name} one taller than the {other} one?",
            "Tell me whether the {name} bar is higher than the {other} bar.",
            "Is the {name} bar higher than the {other} bar?",
            "Is the {name} bar taller than the {other} one?",
        ),
        ("Is the {name} one higher than the {other} one?",),
    ),
    # several pictures
    "more": Phrases(
        (
            "Tell me which {picture} shows more shapes.",
            "Say which {picture} has more shapes.",
            "Which {picture} has more shapes?",
            "Which {picture} shows more shapes?",
            "In which {picture} are there more shapes?",
        ),
        ("Say in which {picture} there are more shapes.",),
    ),
    "fewer": Phrases(
        (
            "Tell me which {picture} has fewer shapes.",
            "Say in which {picture} there are fewer shapes.",
            "Which {picture} has fewer shapes?",
            "Which {picture} shows fewer shapes?",
        ),
        ("In which {picture} are there fewer shapes?",),
    ),
    "most": Phrases(
        (
            "Tell me which {picture} shows the most shapes.",
            "In which {picture} are the most shapes?",
            "Which {picture} has the most shapes?",
            "Which {picture} shows the most shapes?",
        ),
        ("Say which {picture} has the most shapes.",),
    ),
    "changed": Phrases(
        (
            "Say what changed.",
            "What is different now?",
            "What changed in the second {picture}?",
            "Tell me what changed.",
            "What changed?",
            "What is different?",
            "What has changed?",
            "What changed from the first {picture} to the second?",
            "What is the difference?",
        ),
        ("What is different in the second {picture}?",),
    ),
    "changed in video": Phrases(
        (
            "Say what changed.",
            "Tell me what changed.",
            "What changed?",
            "What has changed?",
            "What is different now?",
        ),
        ("What changes in the video?",),
    ),
    "same": Phrases(
        (
            "Do the two {picture}s show the same?",
            "Are both of them the same?",
            "Say whether the {picture}s are the same.",
            "Are the {picture}s the same?",
            "Do both {picture}s show the same?",
            "Are the two {picture}s equal?",
        ),
        ("Are both {picture}s the same?",),
    ),
    "which shows": Phrases(
        (
            "Tell me which {picture} has {name}.",
            "Say in which {picture} there is {name}.",
            "Which {picture} shows {name}?",
            "In which {picture} is {name}?",
            "Which {picture} has {name}?",
            "In which {picture} do you see {name}?",
        ),
        ("Say which {picture} shows {name}.",),
    ),
    "shape in nth": Phrases(
        (
            "Say which shape is in the {nth} {picture}.",
            "Tell me which shape the {nth} {picture} shows.",
            "What shape is in the {nth} {picture}?",
            "Which shape does the {nth} {picture} show?",
        ),
        ("Say what shape the {nth} {picture} shows.",),
    ),
    "colour in nth": Phrases(
        (
            "Tell me the {colour} of the shape in the {nth} {picture}.",
            "What {colour} does the shape in the {nth} {picture} have?",
            "What {colour} is the shape in the {nth} {picture}?",
            "Which {colour} does the shape in the {nth} {picture} have?",
        ),
        ("Tell me what {colour} the shape in the {nth} {picture} is.",),
    ),
    "what in nth": Phrases(
        (
            "Say what is in the {nth} {picture}.",
            "Tell me what the {nth} {picture} shows.",
            "What can you see in the {nth} {picture}?",
            "What is in the {nth} {picture}?",
            "Describe the {nth} {picture}.",
            "What does the {nth} {picture} show?",
        ),
        ("What do you see in the {nth} {picture}?",),
    ),
    # videos
    "direction": Phrases(
        (
            "Say which way it moves.",
            "Tell me where the {name} goes.",
            "In what direction does it move?",
            "Which way does it go?",
            "Which way does it move?",
            "In which direction does the {name} move?",
            "Which way does the {name} move?",
            "Where does the {name} go?",
        ),
        ("Tell me which way the {name} moves.", "In which direction does it go?"),
    ),
    "moves": Phrases(
        (
            "Say what is moving.",
            "Tell me which shape moves.",
            "Which thing moves?",
            "Tell me what moves.",
            "What moves?",
            "Which shape moves?",
            "What is moving?",
        ),
        ("Which shape is moving?",),
    ),
    "first": Phrases(
        (
            "Tell me which shape appears first.",
            "Say what comes first.",
            "Which one comes first?",
            "What appears first?",
            "Which shape appears first?",
            "What comes first?",
        ),
        ("Which shape comes first?",),
    ),
    "last": Phrases(
        (
            "Tell me which shape appears last.",
            "Say what comes last.",
            "Which one comes last?",
            "What appears last?",
            "Which shape appears last?",
            "What comes last?",
        ),
        ("Which shape comes last?",),
    ),
    "order": Phrases(
        (
            "Tell me in which order they appear.",
            "Say in what order the shapes appear.",
            "In which order do they come?",
            "In which order do the shapes appear?",
            "In what order do they appear?",
            "What is the order of the shapes?",
        ),
        ("Tell me the order of the shapes.",),
    ),
    "happens": Phrases(
        (
            "Say what happens in the video.",
            "What happens in this clip?",
            "Tell me what you see in the video.",
            "Tell me what happens.",
            "What happens in the video?",
            "What happens?",
            "Describe the video.",
            "What do you see in the video?",
        ),
        ("What happens in this video?",),
    ),
    # JSON
    "json": Phrases(
        (
            "Give the shapes as JSON.",
            "List all shapes in the {picture} as JSON.",
            "What do you see? Reply in JSON.",
            "Tell me what you see as JSON.",
            "Describe the {picture} as JSON.",
            "Describe the {picture} in JSON.",
            "List the shapes as JSON.",
            "Write what you see as JSON.",
            "Write down what is in the {picture} in JSON.",
            "What is in the {picture}? Answer in JSON.",
        ),
        ("List the shapes in JSON.", "Write the shapes as JSON."),
    ),
    "as json": Phrases(
        (
            "Reply in JSON: {question}",
            "As JSON: {question}",
            "In JSON: {question}",
            "{question} Use JSON.",
            "{question} Answer in JSON.",
            "{question} Answer as JSON.",
            "{question} Reply with JSON.",
        ),
        ("{question} Reply as JSON.", "Answer in JSON: {question}"),
    ),
    # Chinese
    "zh shape": Phrases(
        (
            "请问这是什么形状？",
            "图里是什么形状？",
            "这是什么形状？",
            "图中是什么形状？",
            "图片里有什么形状？",
            "是什么形状？",
        ),
        ("图片里是什么形状？", "图中有什么形状？"),
    ),
    "zh colour": Phrases(
        (
            "图里是什么颜色？",
            "请问它是什么颜色？",
            "图形是什么颜色？",
            "它是什么颜色？",
            "这个图形是什么颜色？",
            "是什么颜色？",
        ),
        ("图中是什么颜色？", "这是什么颜色？"),
    ),
    "zh colour of": Phrases(
        ("图里的{name}是什么颜色？", "{name}是什么颜色？", "{name}的颜色是什么？"),
        ("图中的{name}是什么颜色？",),
    ),
    "zh shape of": Phrases(
        ("{color}的那个是什么形状？", "{color}的是什么形状？", "什么形状是{color}的？"),
        ("{color}的图形是什么形状？",),
    ),
    "zh count": Phrases(
        (
            "图里有几个图形？",
            "请问有几个图形？",
            "有几个图形？",
            "图中有几个图形？",
            "图片里有多少个图形？",
            "一共有几个图形？",
        ),
        ("图片里有几个图形？", "一共有多少个图形？"),
    ),
    "zh where": Phrases(
        ("图里的{name}在哪里？", "请问{name}在哪里？", "{name}在哪里？", "{name}在什么位置？"),
        ("图中的{name}在哪里？",),
    ),
    "zh exists": Phrases(
        ("图里有{name}吗？", "有没有{name}？", "有{name}吗？", "图中有{name}吗？", "图片里有没有{name}？"),
        ("图片里有{name}吗？",),
    ),
    "zh describe": Phrases(
        (
            "请描述图片。",
            "请描述这张图。",
            "图里面有什么？",
            "描述这张图片。",
            "你看到了什么？",
            "图片里有什么？",
            "图中有什么？",
        ),
        ("请描述这张图片。", "图里有什么？"),
    ),
    "zh at": Phrases(
        ("{where}有什么？", "{where}是什么？", "请问{where}有什么？", "图里{where}有什么？"),
        ("图中{where}有什么？",),
    ),
    "zh size": Phrases(
        ("{name}是大还是小？", "图里的{name}是大还是小？", "{name}有多大？"), ("图中的{name}是大还是小？",)
    ),
    "zh unknown": Phrases(
        (
            "法国的首都是哪里？",
            "今天天气怎么样？",
            "现在几点了？",
            "谁发明了电话？",
            "给我讲个笑话。",
            "写一首诗。",
            "你喜欢吃什么？",
            "什么是爱？",
            "三加五等于几？",
            "他是谁？",
            "这张照片是在哪里拍的？",
            "这个多少钱？",
            "{name}有多重？",
            "{name}是什么做的？",
            "怎么做饭？",
            "北京有多少人？",
            "背景是什么颜色？",
            "讲讲中国的历史。",
            "谁画了{name}？",
        ),
        ("明天天气怎么样？", "给我讲个故事。", "谁发明了电灯？", "日本有多少人？", "{name}贵不贵？"),
    ),
    "zh number": Phrases(
        (
            "图里的数字是多少？",
            "这个数字是多少？",
            "这是什么数字？",
            "图中的数字是多少？",
            "图片里是什么数字？",
        ),
        ("图中是什么数字？",),
    ),
}


def say(key: str, rng: random.Random, held_out: bool, **fields: str) -> str:
    phrases = PHRASES[key]
    text = rng.choice(phrases.held_out if held_out else phrases.trained)
    fields.setdefault("colour", rng.choice(("color", "color", "colour")))
    fields.setdefault("picture", rng.choice(("picture", "image")))
    return text.format(**fields)


COURTESIES = ("Please", "Hi", "Hello", "Now", "OK", "Question")


def loosely(text: str, rng: random.Random) -> str:
    """The same as people type it: now and then without its capital or its last mark, or with a word of
    courtesy."""
    kind = rng.random()
    if not text.isascii() or kind > 0.3:
        return text
    if kind < 0.1:
        return text[0].lower() + text[1:]
    if kind < 0.2:
        return text[0].lower() + text[1:].rstrip("?.")
    if kind < 0.25:
        return f"{rng.choice(COURTESIES)}{rng.choice((',', ':'))} {text[0].lower()}{text[1:]}"
    return f"{text} {rng.choice(('Please.', 'Thank you.', 'Answer briefly.', 'Look closely.'))}"
