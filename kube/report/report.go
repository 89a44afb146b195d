// Package report is how isthmus-kube talks to the program that started it: one
// JSON object a line on standard output (ready, or fatal), and slog's JSON lines
// on standard error. isthmusd (internal/kubeapi in the main module) reads both.
package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Codes of fatal errors, for the parent to tell apart what a restart can mend.
const (
	CodeDataDir     = "data-dir"        // the data directory can't be used as it is
	CodeDataDirBusy = "data-dir-in-use" // another process holds its lock
	CodePort        = "port-in-use"     // another process listens there
	CodeEtcd        = "etcd"
	CodeAPIServer   = "kube-apiserver"
	CodeControllers = "controllers"
	CodeUsage       = "usage" // a flag's value is refused
	CodeInternal    = "internal"
)

// Ready says that the API serves.
type Ready struct {
	Address    string `json:"address"`    // https://HOST:PORT for clients on this host
	Port       int    `json:"port"`       // the port chosen, where none was asked for
	Kubeconfig string `json:"kubeconfig"` // the administrator's, mode 0600
	Version    string `json:"version"`    // of Kubernetes
	PID        int    `json:"pid"`
}

// Fatal says why the process ends.
type Fatal struct {
	Code  string `json:"code"`
	Error string `json:"error"`
}

type line struct {
	Ready *Ready `json:"ready,omitempty"`
	Fatal *Fatal `json:"fatal,omitempty"`
}

// WriteReady writes the line of a Ready.
func WriteReady(w io.Writer, r Ready) error {
	return json.NewEncoder(w).Encode(line{Ready: &r})
}

// WriteFatal writes the line of an error with the code that it carries.
func WriteFatal(w io.Writer, err error) error {
	code := CodeInternal
	if coded := (*Error)(nil); errors.As(err, &coded) {
		code = coded.Code
	}
	return json.NewEncoder(w).Encode(line{Fatal: &Fatal{Code: code, Error: err.Error()}})
}

// Error is an error with the code to report it under.
type Error struct {
	Code string
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Errorf is fmt.Errorf under a code.
func Errorf(code, format string, args ...any) error {
	return &Error{Code: code, Err: fmt.Errorf(format, args...)}
}
