package kubeapi

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
)

func TestReadReport(t *testing.T) {
	tests := map[string]struct {
		output string
		port   int
		code   Code
	}{
		"ready":            {`{"ready":{"address":"https://127.0.0.1:1","port":1}}` + "\n", 1, ""},
		"fatal":            {`{"fatal":{"code":"port-in-use","error":"taken"}}` + "\n", 0, CodePortInUse},
		"ready then fatal": {`{"ready":{"port":2}}` + "\n" + `{"fatal":{"code":"etcd","error":"no space left"}}` + "\n", 2, "etcd"},
		"unknown fields":   {`{"ready":{"port":3,"new":true},"newer":{}}`, 3, ""},
		"no report":        {"Usage:\n" + strings.Repeat("x", 1<<17), 0, ""},
		"cut short":        {`{"ready":{"port":`, 0, ""},
		"nothing":          {"", 0, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var got ready
			r := strings.NewReader(tt.output)
			err := readReport(r, func(r ready) { got = r })
			if got.Port != tt.port {
				t.Errorf("port %d, want %d", got.Port, tt.port)
			}
			fatal := (*FatalError)(nil)
			if errors.As(err, &fatal) != (tt.code != "") || fatal != nil && fatal.Code != tt.code {
				t.Errorf("error %v, want code %q", err, tt.code)
			}
			if r.Len() != 0 {
				t.Errorf("%d bytes were not read: the child would block", r.Len())
			}
		})
	}
}

func TestPassLog(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	r := strings.NewReader(strings.Join([]string{
		`{"time":"2026-11-21T04:00:00Z","level":"INFO","msg":"Caches are synced","controller":"gc"}`,
		`{"time":"2026-11-21T04:00:00Z","level":"ERROR","msg":"will retry","err":"no such host","attempt":1}`,
		"panic: out of luck",
		"goroutine 1 [running]:",
		strings.Repeat("x", maxLogLine+1),
		"never reached, but read",
	}, "\n"))
	if printed := passLog(r, log); printed != "panic: out of luck" {
		t.Errorf("printed %q", printed)
	}
	want := `level=DEBUG msg="isthmus-kube logged" message="Caches are synced" controller=gc
level=WARN msg="isthmus-kube logged" message="will retry" attempt=1 err="no such host"
level=WARN msg="isthmus-kube printed" line="panic: out of luck"
level=WARN msg="isthmus-kube printed" line="goroutine 1 [running]:"
`
	if out.String() != want {
		t.Errorf("logged\n%swant\n%s", out.String(), want)
	}
	if r.Len() != 0 {
		t.Errorf("%d bytes were not read: the child would block", r.Len())
	}
}
