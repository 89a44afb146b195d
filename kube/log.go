package main

import (
	"context"
	"io"
	"log/slog"
	"sync/atomic"

	"k8s.io/klog/v2"
)

// phase of the process's life, for its log.
type phase struct{ settled, stopping atomic.Bool }

// ordinary are errors that Kubernetes logs at every start: of an empty flag, and at
// the first of what is made a moment later.
var ordinary = map[string]bool{
	"The manifest file is empty, ignoring.": true,
	"Found stale data, removed previous endpoints on kubernetes service, apiserver didn't exit successfully previously": true,
	"Failed to ensure lease exists, will retry": true,
	"Error while syncing ConfigMap":             true,
}

// quietHandler takes what is no trouble out of warnings and errors: the ordinary
// ones until all parts run, and broken watches while the process stops.
type quietHandler struct {
	slog.Handler
	phase *phase
}

func (h quietHandler) Handle(ctx context.Context, r slog.Record) error {
	if h.phase.stopping.Load() || !h.phase.settled.Load() && ordinary[r.Message] {
		r.Level = min(r.Level, slog.LevelInfo)
		if !h.Enabled(ctx, r.Level) {
			return nil
		}
	}
	return h.Handler.Handle(ctx, r)
}

func (h quietHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return quietHandler{h.Handler.WithAttrs(attrs), h.phase}
}

func (h quietHandler) WithGroup(name string) slog.Handler {
	return quietHandler{h.Handler.WithGroup(name), h.phase}
}

// setupLog sends this process's log and that of the Kubernetes components to w.
func setupLog(w io.Writer, level slog.Level, p *phase) {
	log := slog.New(quietHandler{slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}), p})
	slog.SetDefault(log)
	klog.SetSlogLogger(log)
}
