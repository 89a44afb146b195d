package kube

import (
	"encoding/json"
	"iter"
	"time"

	"isthmus.dev/internal/enroll/member"
	"isthmus.dev/internal/model"
)

// tokenFacts is what the feed holds of a JoinToken.
type tokenFacts struct {
	uid, machine, namespace string
	used                    bool
	expires                 time.Time
}

func decodeToken(raw []byte) (*read, error) {
	var t struct {
		Metadata struct{ Namespace, Name, UID, ResourceVersion string }
		Spec     struct {
			Name      string
			ExpiresAt time.Time
		}
		Status struct{ UsedAt *time.Time }
	}
	if err := json.Unmarshal(raw, &t); err != nil {
		return nil, err
	}
	return &read{
		key: model.Key{Namespace: t.Metadata.Namespace, Name: t.Metadata.Name}, version: t.Metadata.ResourceVersion,
		object: &tokenFacts{t.Metadata.UID, t.Spec.Name, t.Metadata.Namespace, t.Status.UsedAt != nil, t.Spec.ExpiresAt},
	}, nil
}

// tokenMachine has a token found by the machine that it admits.
func tokenMachine(obj any) (model.Key, bool) {
	t, ok := obj.(*tokenFacts)
	if !ok {
		return model.Key{}, false
	}
	return model.Key{Namespace: t.namespace, Name: t.machine}, true
}

// Tokens gives the JoinTokens of a machine; false while not all have been read.
func (s *Source) Tokens(machine model.Key) ([]member.Token, bool) {
	f := s.feeds[kindJoinToken]
	select {
	case <-f.synced:
	default:
		return nil, false
	}
	var list []member.Token
	for _, k := range f.dependOn(machine) {
		if t, ok := s.token(k); ok {
			list = append(list, t)
		}
	}
	return list, true
}

// AllTokens gives those that have been read.
func (s *Source) AllTokens() iter.Seq[member.Token] {
	return func(yield func(member.Token) bool) {
		for _, k := range s.feeds[kindJoinToken].keys() {
			if t, ok := s.token(k); ok && !yield(t) {
				return
			}
		}
	}
}

func (s *Source) token(k model.Key) (member.Token, bool) {
	t, ok := get[*tokenFacts](s, ref{kindJoinToken, k})
	if !ok {
		return member.Token{}, false
	}
	return member.Token{Namespace: k.Namespace, Name: k.Name, UID: t.uid, Used: t.used, Expires: t.expires}, true
}
