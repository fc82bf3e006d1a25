// Arrow keys among the cards, as they lie on the screen.

/**
 * @param {HTMLElement} list whose children each hold one link
 */
export function walkWithArrows(list) {
  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const links = [...list.querySelectorAll("a")];
    const index = links.findIndex((link) => link === document.activeElement);
    if (index < 0) return;
    const columns = columnsOf([...list.children]);
    /** @type {Record<string, number>} */
    const targets = {
      ArrowLeft: index - 1,
      ArrowRight: index + 1,
      ArrowUp: index - columns,
      ArrowDown: index + columns,
      Home: 0,
      End: links.length - 1,
    };
    const target = targets[event.key];
    if (target === undefined) return;
    event.preventDefault();
    links[target]?.focus();
  });
}

/** @param {Element[]} items some of which may be gliding to where they belong */
function columnsOf(items) {
  const tops = items.map((item) => (item instanceof HTMLElement ? item.offsetTop : 0));
  const next = tops.findIndex((top) => top > tops[0]);
  return next < 0 ? items.length : next;
}
