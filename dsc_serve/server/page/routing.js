// What the tokens of one generation picked, put together from the parts of its report, and what can be counted of it.

/** What each word for what is picked goes with: one of them, its weight and its signal. */
const WORDS = {
  atoms: { one: "atom", weights: "coefficients", signal: "signal" },
  experts: { one: "expert", weights: "gates", signal: "largest gate" },
  adapters: { one: "adapter", weights: "gates", signal: "largest gate" },
};

export class Picks {
  /** picks: those of the model's entry in the list of models: {of, layers: [their numbers], number, per_token}. */
  constructor(picks) {
    this.words = { many: picks.of, ...WORDS[picks.of] };
    this.numbers = picks.layers; // of the layers in the model, in which tokens pick anything
    const shape = (this.shape = { layers: picks.layers.length, atoms: picks.number });
    this.tokens = []; // by position: {id, position, layers: [[{atom, coefficient}]], signal: [], keys: Set}
    this.promptSize = Infinity;
    this.highest = new Float32Array(shape.layers + 1); // signal of each layer, and last of their mean
  }

  /** Takes in one `routing` object; returns the tokens that are new. */
  add(routing) {
    const fresh = [];
    routing.token_ids.forEach((id, i) => {
      const position = routing.start + i;
      const layers = routing[this.words.many][i].map((rows, layer) =>
        rows.map((atom, k) => ({ atom, coefficient: routing[this.words.weights][i][layer][k] })),
      );
      const keys = new Set();
      layers.forEach((picked, layer) => picked.forEach(({ atom }) => keys.add(this.key(layer, atom))));
      const token = { id, position, layers, signal: routing.signal[i], keys };
      this.tokens[position] = token;
      fresh.push(token);
      for (let layer = 0; layer <= this.shape.layers; layer++)
        this.highest[layer] = Math.max(this.highest[layer], this.signal(token, layer));
    });
    return fresh;
  }

  key(layer, atom) {
    return layer * this.shape.atoms + atom;
  }

  /** A token's signal in a layer; in "layer" `shape.layers`: the mean of all. */
  signal(token, layer) {
    if (layer < this.shape.layers) return token.signal[layer];
    return token.signal.reduce((sum, value) => sum + value, 0) / token.signal.length;
  }

  /** The signal as a shade from 0 to 1: of the strongest token so far. */
  shade(token, layer) {
    return this.highest[layer] > 0 ? this.signal(token, layer) / this.highest[layer] : 0;
  }

  /** How many of its picks a token shares with another one, in the same layers. */
  shared(token, other) {
    let count = 0;
    for (const key of other.keys) if (token.keys.has(key)) count++;
    return count;
  }

  /** The tokens that share most with one, most first: [{token, count}]. */
  nearest(token, most) {
    return this.tokens
      .filter((other) => other && other !== token)
      .map((other) => ({ token: other, count: this.shared(token, other) }))
      .filter(({ count }) => count > 0)
      .sort((a, b) => b.count - a.count || a.token.position - b.token.position)
      .slice(0, most);
  }

  /** How often each atom was picked: counts [layers × atoms], and by layer how many were picked and the hottest. */
  usage(most) {
    const { layers, atoms } = this.shape;
    const counts = new Uint32Array(layers * atoms);
    for (const token of this.tokens) for (const key of token?.keys ?? []) counts[key]++;
    const rows = Array.from({ length: layers }, (_, layer) => {
      const row = counts.subarray(layer * atoms, (layer + 1) * atoms);
      const used = [...row.keys()].filter((atom) => row[atom] > 0);
      const hottest = used.sort((a, b) => row[b] - row[a] || a - b).slice(0, most);
      return { used: used.length, hottest: hottest.map((atom) => ({ atom, count: row[atom] })) };
    });
    return { counts, rows };
  }
}
