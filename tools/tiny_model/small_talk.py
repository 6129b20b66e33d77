"""Questions that no picture answers. The model says that it does not know, instead of making something up."""

from __future__ import annotations

import random

UNKNOWN = "I do not know. I can only talk about simple pictures."
NO_PICTURE = "There is no picture. Please show me one."
CHINESE_UNKNOWN = "我不知道，我只会看简单的图片。"
CHINESE_NO_PICTURE = "没有图片，请给我看一张。"
CHINESE_HELLO = "你好！请给我看一张简单的图片。"
HELLO = "Hello! Show me a simple picture and ask about it."
WHO = "I am a very small vision model, made to try this server."
CAN = "I can talk about simple pictures: shapes, colors, sizes, places, counts, numbers and short words."

GREETINGS = ("Hello", "Hi", "Hello!", "Hi there", "Good morning", "Hey", "Good evening!", "Hi!")
CHINESE_GREETINGS = ("你好", "你好！", "您好", "您好！", "你好。")
WHO_QUESTIONS = (
    "Who are you?",
    "What are you?",
    "What is your name?",
    "Which model are you?",
    "Are you a person?",
    "Introduce yourself.",
)
CAN_QUESTIONS = (
    "What can you do?",
    "What do you know?",
    "Help",
    "How can you help me?",
    "What can I ask you?",
    "What questions can you answer?",
)
UNKNOWN_QUESTIONS = (
    "What is the capital of {place}?", "How many people live in {place}?",
    "What is the weather in {place} today?",
    "How far is {place} from {place2}?", "Who is the president of {place}?", "Where is {place}?",
    "Tell me a joke about {topic}.",
    "Write a poem about {topic}.", "Write a story about {topic}.", "Explain {topic}.", "What is {topic}?",
    "How does {topic} work?",
    "Who invented {topic}?", "Why is {topic} important?", "What time is it?", "How old is {person}?",
    "Who was {person}?",
    "When was {person} born?", "What did {person} write?", "How old is the universe?", "Translate this text.",
    "What is the meaning of life?",
    "What is {n} plus {m}?", "What is {n} times {m}?", "Solve the equation.",
    "Write a program that sorts {n} numbers.", "How do I cook {food}?",
    "Give me a recipe for {food}.", "What does {food} taste like?", "Is {food} healthy?",
    "What is the price of {food}?",
    "Who is in the {picture}?", "What breed is the dog?", "Where was the {picture} taken?",
    "Who took this {picture}?", "What camera was used?",
    "How old is the person in the {picture}?", "What is the person doing?", "What is the name of this city?",
    "What is the weather in the {picture}?", "What should I wear tomorrow?",
    "Can you book a flight to {place}?",
    "Recommend a book about {topic}.", "Summarize the news.", "What is your favorite {topic}?",
    "Do you like {food}?", "How do I fix my {topic}?",
    "What happened in {year}?", "Who won the world cup in {year}?", "Sing a song.", "What is love?",
    "Which language is spoken in {place}?",
    "How tall is {person}?", "Is {person} happy?", "What material is it made of?", "How much does it cost?",
    "What is {n} divided by {m}?", "How much is {n} and {m}?", "Add {n} and {m}.", "What is half of {n}?",
    "Is {n} larger than {m}?",
    "What is the longest river of {place}?", "What is the smallest village of {place}?",
    "Name a city of {place}.", "What do people eat in {place}?",
    "Tell me something about {topic}.", "Tell me a story about {person}.", "Tell me a fact about {place}.",
    "What do you think about {topic}?",
    "What can you say about {person}?", "Who works in {place}?", "Where can I buy {food}?",
    "What is the story of {topic}?", "Where is {person} now?",
    "Write an essay on {topic}.", "Write to {person}.", "Is it cold in {place}?",
    "Who is the woman in the {picture}?", "Who is this person?",
)  # fmt: skip
HELD_OUT_UNKNOWN_QUESTIONS = (
    "What is the largest city of {place}?", "Tell me about {person}.", "What do you know about {topic}?",
    "Who lives in {place}?",
    "How expensive is {food}?", "What is the history of {topic}?", "Where does {food} come from?",
    "What is {n} minus {m}?",
    "Is it warm in {place} in {year}?", "Who is the person in the {picture}?", "Write a letter to {person}.",
)  # fmt: skip
FILLERS = {
    "place": (
        "France", "Germany", "Japan", "Paris", "London", "Africa", "China", "India", "Brazil", "New York",
        "Rome", "Egypt", "Canada", "Spain",
        "Moscow",
    ),
    "topic": (
        "music", "physics", "history", "computers", "love", "the internet", "gravity", "football", "money",
        "art", "time", "water", "electricity",
        "Python", "chess", "a car", "the moon", "dogs", "war", "science", "mathematics", "a neural network",
    ),
    "person": (
        "Einstein", "Shakespeare", "Newton", "Mozart", "Picasso", "the king", "the author", "Marie Curie",
        "my mother", "Napoleon", "Obama",
    ),
    "food": (
        "pasta", "rice", "soup", "chocolate", "a sandwich", "fish", "an egg", "cheese", "coffee", "salad",
    ),
    "year": (
        "1990", "2001", "1945", "2020", "1812", "2014",
    ),
}  # fmt: skip

# What the things in a picture might be asked about, beyond what the model is taught. Many words, so that
# others are no surprise either.
OF_THINGS = {
    "noun": (
        "price", "age", "height", "temperature", "speed", "volume", "length", "width", "depth", "angle",
        "radius", "diameter", "perimeter",
        "surface", "texture", "taste", "smell", "sound", "mood", "history", "origin", "meaning", "purpose",
        "owner", "author", "father", "mother",
        "language", "country", "city", "brand", "model", "value", "power", "energy", "mass", "density",
        "weather", "date", "year", "day", "hour",
        "secret", "story", "future", "past", "job", "address", "phone number", "password", "religion",
        "birthday", "school", "favorite food",
        "best friend", "title", "topic", "reason", "problem", "voice", "hair", "face", "mind", "soul",
        "gender", "quality", "pattern", "resolution",
        "format", "file", "use", "cost", "strength", "health", "risk", "family", "leader", "version", "type",
        "state", "content", "source",
        "average", "sum", "name",
    ),
    "adjective": (
        "angry", "tired", "heavy", "cheap", "expensive", "alive", "dead", "funny", "serious", "smart",
        "dangerous", "poisonous", "healthy", "tasty",
        "sweet", "salty", "cold", "hot", "wet", "dry", "soft", "hard", "sharp", "metal", "wooden", "plastic",
        "new", "old", "young", "famous",
        "rich", "poor", "married", "female", "male", "friendly", "evil", "good", "bad", "nice", "pretty",
        "ugly", "clean", "dirty", "broken",
        "open", "closed", "fast", "slow", "strong", "weak", "loud", "quiet", "real", "fake", "magic", "legal",
        "free", "useful", "valid", "correct",
        "safe", "perfect", "common", "rare", "important", "interesting",
    ),
    "verb": (
        "fly", "swim", "run", "eat", "drink", "sleep", "think", "talk", "sing", "dance", "read", "write",
        "see", "hear", "feel", "work", "play",
        "fight", "smile", "cry", "die", "grow", "burn", "float", "explode", "jump", "walk", "drive", "cook",
        "pay", "vote", "bite", "know", "want",
        "need", "make", "use", "love", "hate", "live", "start", "stop", "change its mind", "help", "break",
        "sell", "learn", "teach",
    ),
}  # fmt: skip


def unknown_question(rng: random.Random, held_out: bool) -> str:
    fields = {name: rng.choice(values) for name, values in FILLERS.items()}
    text = rng.choice(HELD_OUT_UNKNOWN_QUESTIONS if held_out else UNKNOWN_QUESTIONS)
    place2, picture = rng.choice(FILLERS["place"]), rng.choice(("picture", "image", "photo"))
    return text.format(place2=place2, picture=picture, n=rng.randint(2, 99), m=rng.randint(2, 99), **fields)
