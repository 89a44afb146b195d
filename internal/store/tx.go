package store

// Root is a retained result. Equal roots are the same rule and key.
type Root uint32

// Tx is exclusive access to one revision, to retain and release results.
type Tx struct{ s *Store }

// Update gives f exclusive access to the current revision.
func (s *Store) Update(f func(*Tx)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.graph.collect()
	f(&Tx{s})
}

// Reader reads the revision, and records nothing.
func (tx *Tx) Reader() *Reader { return &Reader{store: tx.s} }

// Revision is the one that the Tx has access to.
func (tx *Tx) Revision() uint64 { return tx.s.graph.revision }

// Retain evaluates a rule and keeps the result up to date until it is released
// as often as it was retained.
func Retain[K comparable, V any](tx *Tx, rule *Rule[K, V], k K) (Root, V) {
	n := openRule(tx.s, rule, true).current(k)
	tx.s.graph.at(n.id).roots++
	return Root(n.id), n.value
}

// Result gives what Retain gave, of now. It is a V of the root's rule.
func (tx *Tx) Result(root Root) any { return tx.s.graph.at(vertexID(root)).owner.(resulting).result() }

// Release undoes one Retain.
func (tx *Tx) Release(root Root) {
	g := tx.s.graph
	v := g.at(vertexID(root))
	v.roots--
	if !v.wanted() {
		g.orphans = append(g.orphans, vertexID(root))
	}
}
