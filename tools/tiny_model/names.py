"""What the model knows by name."""

from __future__ import annotations

Color = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
COLORS: dict[str, Color] = {
    "red": (214, 32, 38),
    "orange": (245, 138, 20),
    "yellow": (248, 222, 40),
    "green": (40, 160, 62),
    "blue": (36, 76, 212),
    "purple": (128, 44, 160),
    "pink": (250, 140, 190),
    "brown": (122, 72, 30),
    "black": (18, 18, 20),
    "white": (250, 250, 250),
}
CELLS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
CLOTHES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
EMOJI = {
    "cat": "🐱", "dog": "🐶", "mouse": "🐭", "rabbit": "🐰", "fox": "🦊", "bear": "🐻", "panda": "🐼", "frog": "🐸", "monkey": "🐵",
    "chicken": "🐔", "penguin": "🐧", "fish": "🐟", "elephant": "🐘", "turtle": "🐢", "bee": "🐝", "butterfly": "🦋", "cactus": "🌵",
    "tree": "🌲", "sunflower": "🌻", "rose": "🌹", "apple": "🍎", "banana": "🍌", "strawberry": "🍓", "lemon": "🍋", "pizza": "🍕",
    "hamburger": "🍔", "cake": "🎂", "football": "⚽", "basketball": "🏀", "car": "🚗", "bus": "🚌", "bicycle": "🚲", "rocket": "🚀",
    "sailboat": "⛵", "house": "🏠", "clock": "⏰", "camera": "📷", "key": "🔑", "light bulb": "💡", "balloon": "🎈", "guitar": "🎸",
    "crown": "👑", "sun": "🌞", "moon": "🌙", "fire": "🔥", "smiling face": "😀", "crying face": "😢", "angry face": "😠",
}  # fmt: skip
