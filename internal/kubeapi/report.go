package kubeapi

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"maps"
	"slices"
)

// Code says what kind of error isthmus-kube ended with (kube/report has the list).
type Code string

// Codes that a caller may want to tell apart.
const (
	CodeDataDirInUse Code = "data-dir-in-use"
	CodePortInUse    Code = "port-in-use"
)

// FatalError is the error that isthmus-kube reported before it ended.
type FatalError struct {
	Code    Code
	Message string
}

func (e *FatalError) Error() string { return e.Message }

// ready is the report that the API serves.
type ready struct {
	Address    string `json:"address"`
	Port       int    `json:"port"`
	Kubeconfig string `json:"kubeconfig"`
	Version    string `json:"version"`
	PID        int    `json:"pid"`
}

// readReport reads a child's standard output to its end: it hands over the report
// that it serves, and returns the error that it reported, nil if it did not.
func readReport(r io.Reader, onReady func(ready)) error {
	var fatal error
	dec := json.NewDecoder(r)
	for {
		var line struct {
			Ready *ready `json:"ready"`
			Fatal *struct {
				Code  Code   `json:"code"`
				Error string `json:"error"`
			} `json:"fatal"`
		}
		if err := dec.Decode(&line); err != nil {
			drain(r) // whatever else it prints is no report
			return fatal
		}
		if line.Ready != nil {
			onReady(*line.Ready)
		}
		if line.Fatal != nil {
			fatal = &FatalError{Code: line.Fatal.Code, Message: line.Fatal.Error}
		}
	}
}

const maxLogLine = 1 << 20

// passLog writes a child's log lines to log until they end, and returns the first
// one that is none of slog's: the first words of a panic, if it had one.
//
// What interests Kubernetes' developers is debug here; what its components call an
// error they try again, so it is a warning.
func passLog(r io.Reader, log *slog.Logger) (printed string) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLogLine)
	for lines.Scan() {
		var entry map[string]any
		if err := json.Unmarshal(lines.Bytes(), &entry); err != nil {
			if printed == "" {
				printed = lines.Text()
			}
			log.Warn("isthmus-kube printed", "line", lines.Text())
			continue
		}
		level := slog.LevelDebug
		if l := entry[slog.LevelKey]; l == slog.LevelWarn.String() || l == slog.LevelError.String() {
			level = slog.LevelWarn
		}
		message := entry[slog.MessageKey]
		for _, key := range []string{slog.TimeKey, slog.LevelKey, slog.MessageKey} {
			delete(entry, key)
		}
		attrs := []slog.Attr{slog.Any("message", message)}
		for _, key := range slices.Sorted(maps.Keys(entry)) {
			attrs = append(attrs, slog.Any(key, entry[key]))
		}
		log.LogAttrs(context.Background(), level, "isthmus-kube logged", attrs...)
	}
	drain(r)
	return printed
}

// drain reads on, so that who writes is never blocked.
func drain(r io.Reader) { _, _ = io.Copy(io.Discard, r) }
