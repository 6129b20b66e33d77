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
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CLOTHES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
EMOJI = {
    "cat": "🐱", "dog": "🐶", "mouse": "🐭", "rabbit": "🐰", "fox": "🦊", "bear": "🐻",
    "panda": "🐼", "frog": "🐸",
    "monkey": "🐵",
    "chicken": "🐔", "penguin": "🐧", "fish": "🐟", "elephant": "🐘", "turtle": "🐢",
    "bee": "🐝", "butterfly": "🦋",
    "cactus": "🌵",
    "tree": "🌲", "sunflower": "🌻", "rose": "🌹", "apple": "🍎", "banana": "🍌",
    "strawberry": "🍓", "lemon": "🍋",
    "pizza": "🍕",
    "hamburger": "🍔", "cake": "🎂", "football": "⚽", "basketball": "🏀", "car": "🚗",
    "bus": "🚌", "bicycle": "🚲",
    "rocket": "🚀",
    "sailboat": "⛵", "house": "🏠", "clock": "⏰", "camera": "📷", "key": "🔑",
    "light bulb": "💡", "balloon": "🎈",
    "guitar": "🎸",
    "crown": "👑", "sun": "🌞", "moon": "🌙", "fire": "🔥", "smiling face": "😀", "crying face": "😢",
    "angry face": "😠",
}  # fmt: skip
CHINESE = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字",
    "ring": "圆环",
    "heart": "心形", "diamond": "菱形",
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色",
    "purple": "紫色", "pink": "粉色",
    "brown": "棕色",
    "black": "黑色", "white": "白色", "top left": "左上角", "top": "上方", "top right": "右上角",
    "left": "左边",
    "center": "中间", "right": "右边",
    "bottom left": "左下角", "bottom": "下方", "bottom right": "右下角",
}  # fmt: skip


def in_chinese(name: str) -> str:
    """Of a colour and a shape: "red star"."""
    color, shape = name.split()
    return f"{CHINESE[color]}的{CHINESE[shape]}"
