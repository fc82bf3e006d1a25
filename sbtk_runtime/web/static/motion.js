// Cards that move to their new places, for who does not mind things moving.

const MS = 220;

/**
 * Runs `change` and lets elements that are in sight glide from where they were.
 * @param {Iterable<HTMLElement>} elements
 * @param {() => void} change
 */
export function glide(elements, change) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
    change();
    return;
  }
  const before = new Map([...elements].map((element) => [element, element.getBoundingClientRect()]));
  change();
  const moves = [...before].map(([element, was]) => ({ element, was, is: element.getBoundingClientRect() }));
  for (const { element, was, is } of moves) {
    const [dx, dy] = [was.left - is.left, was.top - is.top];
    const isSeen = is.top < window.innerHeight && was.top < window.innerHeight && is.bottom > 0;
    if (!isSeen || !element.isConnected || (dx === 0 && dy === 0)) continue;
    element.animate([{ transform: `translate(${dx}px, ${dy}px)` }, { transform: "none" }], {
      duration: MS,
      easing: "cubic-bezier(0.2, 0, 0, 1)",
    });
  }
}
