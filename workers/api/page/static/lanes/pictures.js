// Draws pictures that no cache has seen: a few shapes, at places and in colours that are drawn by chance.

const SIZE = 448; // pixels
const COLOURS = ["#d62828", "#2a6fdb", "#2a9d4b", "#f4c20d", "#8e44ad", "#f2740d"];
const NUM_SHAPES = 3;

/** @param {number} most */
function upTo(most) {
  return Math.random() * most;
}

/** @returns {string} a data: URL of a PNG */
export function newPicture() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIZE;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.fillStyle = `rgb(${235 + upTo(20)} ${235 + upTo(20)} ${235 + upTo(20)})`;
  context.fillRect(0, 0, SIZE, SIZE);
  for (let index = 0; index < NUM_SHAPES; index += 1) {
    context.fillStyle = COLOURS[Math.floor(upTo(COLOURS.length))];
    drawShape(context, 80 + upTo(SIZE - 160), 80 + upTo(SIZE - 160), 40 + upTo(40), Math.floor(upTo(3)));
  }
  return canvas.toDataURL("image/png");
}

/** @param {CanvasRenderingContext2D} context @param {number} x @param {number} y @param {number} radius
 * @param {number} kind */
function drawShape(context, x, y, radius, kind) {
  const numCorners = [0, 3, 4][kind];
  context.beginPath();
  if (!numCorners) context.arc(x, y, radius, 0, 2 * Math.PI);
  for (let corner = 0; corner < numCorners; corner += 1) {
    const angle = (2 * Math.PI * corner) / numCorners - Math.PI / 2;
    context.lineTo(x + radius * Math.cos(angle), y + radius * Math.sin(angle));
  }
  context.fill();
}
