package xds

import (
	"context"
	"log/slog"
	"strings"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// maxTries bounds the refusals in a row that are spent on finding culprits. Past
// it, what is refused together stays refused together, until something is accepted.
const maxTries = 128

// maxDetail bounds what is kept of a proxy's own words.
const maxDetail = 16 << 10

// answer takes in what the proxy made of the response in flight.
func (s *session) answer(t *typeState, req *discoveryv3.DeltaDiscoveryRequest) {
	f := t.flight
	if f == nil || f.nonce != req.ResponseNonce {
		return // of an older response, or an older stream
	}
	t.flight = nil
	if req.ErrorDetail == nil {
		s.accept(t, f)
	} else {
		detail := req.ErrorDetail.GetMessage()
		s.refuse(t, f, detail[:min(len(detail), maxDetail)])
	}
}

func (s *session) accept(t *typeState, f *flight) {
	for _, r := range f.resources {
		if len(t.refused) == 0 {
			break
		}
		delete(t.refused, r.Name)
	}
	if f.removal {
		// A listener may have been refused because one that is gone by now had
		// its address.
		if t.rank == rankListener {
			t.reconsider()
		}
		return
	}
	// And a virtual host because another had its domain, that is now gone or has
	// given it up.
	if t.rank == rankHost {
		t.reconsider()
	}
	if len(t.retries) == 0 {
		t.tries = 0
	}
	if f.last && len(t.retries) == 0 {
		s.report(t, f.revision)
	}
}

// reconsider has what was refused sent again.
func (t *typeState) reconsider() {
	for name, was := range t.refused {
		t.changed.add(name, was.push)
	}
	t.refused = nil
}

// refuse remembers what was refused, if it was one resource, and else has the
// parts of the response sent apart. A proxy may have applied some of it; what it
// is sent again unchanged costs it nothing.
func (s *session) refuse(t *typeState, f *flight, detail string) {
	s.counters.refused(t.rank)
	names := make([]string, len(f.resources))
	for i, r := range f.resources {
		names[i] = r.Name
	}
	t.tries++
	if len(names) > 1 && t.tries <= maxTries {
		t.retries = append(split(names, detail, f.push), t.retries...)
	} else {
		s.mark(t, f, names, detail)
	}
	if len(names) > 0 && t.rank == rankHost {
		t.removals.again(f.removed, f.push)
	} else if len(names) > 0 {
		// Removals of a refused response did not happen either.
		for _, name := range f.removed {
			t.answers.add(name, f.push)
		}
	}
}

func (s *session) mark(t *typeState, f *flight, names []string, detail string) {
	if len(names) == 0 {
		names = f.removed
	}
	// A broken proxy refuses whatever it is sent. All are reported below.
	level := slog.LevelWarn
	if s.warned {
		level = slog.LevelDebug
	}
	s.warned = true
	s.log.Log(context.Background(), level, "proxy refused configuration; what else it refuses is logged at debug level", slog.String("type", t.url), slog.Any("names", names[:min(len(names), 10)]),
		slog.Int("count", len(names)), slog.String("detail", detail))
	for _, r := range f.resources {
		if s.given(s.view, t, r.Name) == nil {
			continue // given up, or gone, meanwhile
		}
		if t.refused == nil {
			t.refused = map[string]refusal{}
		}
		push := f.push
		if was, ok := t.refused[r.Name]; ok {
			push = min(push, was.push)
		}
		t.refused[r.Name] = refusal{r.Version, push}
	}
	if s.refuser != nil && len(f.resources) > 0 {
		s.refuser.RefusedResources(t.url, f.resources, detail)
		return
	}
	s.sub.Refused(t.url, names, detail)
}

func (t *typeState) refusedAt(r *Resource) bool {
	if len(t.refused) == 0 {
		return false
	}
	was, ok := t.refused[r.Name]
	return ok && was.version == r.Version
}

// retry makes a response of one part of a refused one, in its newest version.
func (s *session) retry(t *typeState) *flight {
	for len(t.retries) > 0 {
		part := t.retries[0]
		t.retries = t.retries[1:]
		f := &flight{push: part.push, revision: s.view.Revision()}
		for _, name := range part.names {
			if t.changed.has(name) {
				continue // a newer version, which comes next
			}
			if r := s.given(s.view, t, name); r != nil && !t.refusedAt(r) {
				f.resources = append(f.resources, r)
			}
		}
		if len(f.resources) > 0 {
			if t.rank == rankHost {
				s.removedHosts(t, f)
			}
			f.last = t.answers.len() == 0 && t.changed.len() == 0
			return f
		}
	}
	t.retries = nil
	return nil
}

// split parts the names of a refused response: those that the proxy's words name
// from those that they don't, or else in halves. What is likely good goes first.
func split(names []string, detail string, push uint64) []batch {
	var named, others []string
	for _, name := range names {
		if mentions(detail, name) {
			named = append(named, name)
		} else {
			others = append(others, name)
		}
	}
	if len(named) == 0 || len(others) == 0 {
		half := len(names) / 2
		others, named = names[:half], names[half:]
	}
	return []batch{{others, push}, {named, push}}
}

// mentions says whether a name occurs in a text as a whole.
func mentions(text, name string) bool {
	for at := 0; name != ""; {
		i := strings.Index(text[at:], name)
		if i < 0 {
			return false
		}
		i += at
		end := i + len(name)
		if (i == 0 || !inName(text[i-1])) && (end == len(text) || !inName(text[end])) {
			return true
		}
		at = i + 1
	}
	return false
}

func inName(c byte) bool {
	return c == '_' || c == '-' || c == '|' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}
