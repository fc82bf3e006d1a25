// Geometry of strokes: what a point or a box touches, what erasing leaves, and transforms. Nothing is changed in place.

/** @typedef {import("./drawing.js").Point} Point */
/** @typedef {import("./drawing.js").Stroke} Stroke */
/** @typedef {import("./drawing.js").Mark} Mark */
/** @typedef {{ x: number, y: number }} Place in units */
/** @typedef {{ left: number, top: number, right: number, bottom: number }} Box in units */

// Erased strokes are cut with this accuracy, in units.
const CUT_STEP = 2;
/** @type {WeakMap<Stroke, WeakMap<Stroke, readonly Stroke[]>>} what eraser strokes leave of strokes */
const cuts = new WeakMap();

/**
 * Returns the box around the ink of strokes; null without strokes.
 * @param {readonly Stroke[]} strokes
 * @returns {Box | null}
 */
export function boundsOf(strokes) {
  if (strokes.length === 0) return null;
  const box = { left: Infinity, top: Infinity, right: -Infinity, bottom: -Infinity };
  for (const { points } of strokes) {
    for (const { x, y, width } of points) {
      box.left = Math.min(box.left, x - width / 2);
      box.top = Math.min(box.top, y - width / 2);
      box.right = Math.max(box.right, x + width / 2);
      box.bottom = Math.max(box.bottom, y + width / 2);
    }
  }
  return box;
}

/**
 * Returns the distance from the ink of a stroke to the line between two places; 0 if they touch.
 * @param {Stroke} stroke
 * @param {Place} from
 * @param {Place} [to]
 * @returns {number} in units
 */
export function distanceTo({ points }, from, to = from) {
  let least = Infinity;
  for (let index = 0; index < points.length; index += 1) {
    const point = points[index];
    const next = points[Math.min(index + 1, points.length - 1)];
    if (cross(point, next, from, to)) return 0;
    const distance = Math.min(toLine(point, from, to), toLine(from, point, next), toLine(to, point, next));
    least = Math.min(least, distance - Math.max(point.width, next.width) / 2);
  }
  return Math.max(0, least);
}

/**
 * Returns whether a stroke enters a box.
 * @param {Stroke} stroke
 * @param {Box} box
 * @returns {boolean}
 */
export function enters({ points }, { left, top, right, bottom }) {
  const corners = [[left, top], [right, top], [right, bottom], [left, bottom]].map(([x, y]) => ({ x, y }));
  return points.some((point, index) => {
    if (point.x >= left && point.x <= right && point.y >= top && point.y <= bottom) return true;
    const next = points[index + 1] ?? point;
    return corners.some((corner, side) => cross(point, next, corner, corners[(side + 1) % 4]));
  });
}

/**
 * Returns what is visible of each pen stroke: strokes that later eraser strokes cut fall into parts.
 * @param {readonly Mark[]} marks
 * @returns {Map<Stroke, Stroke[]>} without strokes that are erased completely
 */
export function visibleParts(marks) {
  /** @type {Map<Stroke, Stroke[]>} */
  const visible = new Map();
  for (const mark of marks) {
    if (mark.kind !== "stroke") continue;
    if (mark.tool === "pen") {
      visible.set(mark, [mark]);
      continue;
    }
    for (const [stroke, parts] of visible) {
      const left = parts.flatMap((part) => partsOutside(part, mark));
      if (left.length > 0) visible.set(stroke, left);
      else visible.delete(stroke);
    }
  }
  return visible;
}

/**
 * Returns the marks without some pen strokes. Eraser strokes that have nothing left to erase go too.
 * @param {readonly Mark[]} marks
 * @param {ReadonlySet<Mark>} removed
 * @returns {Mark[]}
 */
export function without(marks, removed) {
  const kept = marks.filter((mark) => !removed.has(mark));
  const first = kept.findIndex((mark) => (mark.kind === "stroke" ? mark.tool === "pen" : !mark.isTraced));
  return kept.filter((mark, index) => mark.kind === "image" || (first >= 0 && index >= first));
}

/**
 * Returns a stroke with its points transformed. The width of the line stays.
 * @param {Stroke} stroke
 * @param {DOMMatrixReadOnly} matrix
 * @returns {Stroke}
 */
export function transformed(stroke, { a, b, c, d, e, f }) {
  const points = stroke.points.map(({ x, y, width }) => ({ x: a * x + c * y + e, y: b * x + d * y + f, width }));
  return { ...stroke, points };
}

/**
 * Returns the matrix that scales about a place. A negative scale mirrors.
 * @param {Place} about
 * @param {number} scaleX
 * @param {number} [scaleY]
 */
export function scaling({ x, y }, scaleX, scaleY = scaleX) {
  return new DOMMatrix().scale(scaleX, scaleY, 1, x, y);
}

/**
 * Returns the matrix that rotates clockwise about a place.
 * @param {Place} about
 * @param {number} degrees
 */
export function rotation({ x, y }, degrees) {
  return new DOMMatrix().translate(x, y).rotate(degrees).translate(-x, -y);
}

/** @param {Box} box @returns {Place} */
export function centreOf({ left, top, right, bottom }) {
  return { x: (left + right) / 2, y: (top + bottom) / 2 };
}

/**
 * Moves the end of a line to the nearest multiple of an angle, at the same distance.
 * @param {Place} from
 * @param {Place} to
 * @param {number} degrees
 * @returns {Place}
 */
export function snapped(from, to, degrees) {
  const step = (degrees * Math.PI) / 180;
  const angle = Math.round(Math.atan2(to.y - from.y, to.x - from.x) / step) * step;
  const length = Math.hypot(to.x - from.x, to.y - from.y);
  return { x: from.x + length * Math.cos(angle), y: from.y + length * Math.sin(angle) };
}

/**
 * @param {Stroke} stroke
 * @param {Stroke} eraser
 * @returns {readonly Stroke[]} the stroke itself if the eraser does not touch it
 */
function partsOutside(stroke, eraser) {
  const known = cuts.get(stroke)?.get(eraser);
  if (known !== undefined) return known;
  const parts = cutOut(stroke, eraser);
  cuts.set(stroke, (cuts.get(stroke) ?? new WeakMap()).set(eraser, parts));
  return parts;
}

/**
 * @param {Stroke} stroke
 * @param {Stroke} eraser
 * @returns {readonly Stroke[]}
 */
function cutOut(stroke, eraser) {
  const [a, b] = [boundsOf([stroke]), boundsOf([eraser])];
  if (a === null || b === null || a.left > b.right || b.left > a.right || a.top > b.bottom || b.top > a.bottom) {
    return [stroke];
  }
  const points = refined(stroke.points);
  const isErased = points.map((point) => covers(eraser, point));
  if (!isErased.includes(true)) return [stroke];
  /** @type {Point[][]} */
  const parts = [[]];
  points.forEach((point, index) => {
    if (isErased[index]) parts.push([]);
    else parts[parts.length - 1].push(point);
  });
  return parts
    .map((part, index) => shortened(part, index > 0 ? part[0] : null, index < parts.length - 1 ? part[part.length - 1] : null))
    .filter((part) => part.length > 0)
    .map((part) => ({ ...stroke, points: part }));
}

/**
 * Takes half a line's width off each end that was cut, because ends are drawn round. What is shorter becomes a dot.
 * @param {readonly Point[]} points
 * @param {(Point | null | undefined)[]} cutEnds
 */
function shortened(points, ...cutEnds) {
  const isLeft = (/** @type {Point} */ { x, y, width }, /** @type {Point | null | undefined} */ end) =>
    !end || Math.hypot(x - end.x, y - end.y) >= width / 2 - CUT_STEP;
  const left = points.filter((point) => cutEnds.every((end) => isLeft(point, end)));
  const middle = points.length >> 1;
  return left.length > 0 ? left : points.slice(middle, middle + 1);
}

/** @param {Stroke} stroke @param {Place} place */
function covers({ points }, place) {
  const { x, y } = place;
  for (let index = 0; index < points.length; index += 1) {
    const a = points[index];
    const b = points[Math.min(index + 1, points.length - 1)];
    const reach = Math.max(a.width, b.width) / 2;
    // Most lines are far away, which is quick to see.
    if ((x < a.x - reach && x < b.x - reach) || (x > a.x + reach && x > b.x + reach)) continue;
    if ((y < a.y - reach && y < b.y - reach) || (y > a.y + reach && y > b.y + reach)) continue;
    if (toLine(place, a, b) <= reach) return true;
  }
  return false;
}

/**
 * Returns points on the same line, no farther than CUT_STEP apart.
 * @param {readonly Point[]} points
 * @returns {Point[]}
 */
function refined(points) {
  return points.flatMap((point, index) => {
    const next = points[index + 1] ?? point;
    const steps = Math.max(1, Math.ceil(Math.hypot(next.x - point.x, next.y - point.y) / CUT_STEP));
    return Array.from({ length: steps }, (_, step) => between(point, next, step / steps));
  });
}

/** @param {Point} a @param {Point} b @param {number} share @returns {Point} */
function between(a, b, share) {
  return {
    x: a.x + (b.x - a.x) * share,
    y: a.y + (b.y - a.y) * share,
    width: a.width + (b.width - a.width) * share,
  };
}

/** @param {Place} point @param {Place} a @param {Place} b */
function toLine(point, a, b) {
  const dx = b.x - a.x;
  const dy = b.y - a.y;
  const length = dx * dx + dy * dy;
  const along = length === 0 ? 0 : ((point.x - a.x) * dx + (point.y - a.y) * dy) / length;
  const share = Math.min(1, Math.max(0, along));
  const awayX = point.x - a.x - share * dx;
  const awayY = point.y - a.y - share * dy;
  return Math.sqrt(awayX * awayX + awayY * awayY);
}

/** @param {Place} a @param {Place} b @param {Place} c @param {Place} d @returns {boolean} */
function cross(a, b, c, d) {
  return side(a, b, c) * side(a, b, d) < 0 && side(c, d, a) * side(c, d, b) < 0;
}

/** @param {Place} p @param {Place} q @param {Place} r */
function side(p, q, r) {
  return Math.sign((q.x - p.x) * (r.y - p.y) - (q.y - p.y) * (r.x - p.x));
}
