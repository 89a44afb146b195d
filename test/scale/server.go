package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// kubeconfig of an API at a URL.
func kubeconfig(url string) []byte {
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: stub, cluster: {server: %q}}]
users: [{name: stub, user: {}}]
contexts: [{name: stub, context: {cluster: stub, user: stub}}]
current-context: stub
`, url)
}

// server is a control plane under measurement: a process whose only view of the
// world is the stub, and that serves plaintext ADS on a loopback address.
type server struct {
	name  string
	cmd   *exec.Cmd
	log   *os.File
	ended chan error

	ads, ready, push, profiles string
	startup                    time.Duration
}

// newIsthmusd prepares ours.
func newIsthmusd(binary, dir string, ports []int) *server {
	at := func(i int) string { return "127.0.0.1:" + strconv.Itoa(ports[i]) }
	s := &server{name: "isthmusd", ads: at(0), ready: "http://" + at(1) + "/ready", profiles: "http://" + at(1) + "/debug/pprof/"}
	s.cmd = exec.Command(binary, "--kubeconfig", filepath.Join(dir, "kubeconfig"), "--xds-plaintext", at(0), "--monitoring", at(1),
		"--listen", at(2), "--webhook", at(3))
	return s
}

// newIstiod prepares istiod as shipped, but for its limit on new streams, which is
// lifted.
func newIstiod(binary, dir string, ports []int) *server {
	at := func(i int) string { return "127.0.0.1:" + strconv.Itoa(ports[i]) }
	s := &server{name: "istiod", ads: at(0), ready: "http://" + at(1) + "/ready", push: "http://" + at(1) + "/debug/adsz?push=true",
		profiles: "http://" + at(1) + "/debug/pprof/"}
	s.cmd = exec.Command(binary, "discovery", "--registries=Kubernetes", "--kubeconfig", filepath.Join(dir, "kubeconfig"),
		"--meshConfig", filepath.Join(dir, "mesh.yaml"), "--networksConfig", filepath.Join(dir, "none"),
		"--grpcAddr", at(0), "--httpAddr", at(1), "--secureGRPCAddr", at(2), "--httpsAddr", at(3), "--monitoringAddr", at(4), "--ctrlz_port", "0")
	s.cmd.Env = append(os.Environ(), "ISTIO_KUBE_CLIENT_CONTENT_TYPE=json", "POD_NAMESPACE=istio-system", "POD_NAME=istiod-0",
		"PILOT_MAX_REQUESTS_PER_SECOND=100000")
	return s
}

// start runs the server until it serves.
func (s *server) start(ctx context.Context, api, dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "kubeconfig"), kubeconfig(api), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "mesh.yaml"), []byte("defaultConfig:\n  discoveryAddress: 127.0.0.1:15012\n"), 0o600); err != nil {
		return err
	}
	var err error
	if s.log, err = os.Create(filepath.Join(dir, s.name+".log")); err != nil {
		return err
	}
	s.cmd.Dir, s.cmd.Stdout, s.cmd.Stderr = dir, s.log, s.log
	begin := time.Now()
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.ended = make(chan error, 1)
	go func() { s.ended <- s.cmd.Wait() }()
	for {
		if r, err := http.Get(s.ready); err == nil {
			r.Body.Close()
			if r.StatusCode == http.StatusOK {
				s.startup = time.Since(begin)
				return nil
			}
		}
		select {
		case err := <-s.ended:
			s.ended <- err
			return fmt.Errorf("%s ended before it served: %w; its last lines:\n%s", s.name, err, s.tail())
		case <-ctx.Done():
			s.stop()
			return fmt.Errorf("%s did not serve: %w; its last lines:\n%s", s.name, ctx.Err(), s.tail())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (s *server) tail() string {
	b, err := os.ReadFile(s.log.Name())
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

// stop ends the process.
func (s *server) stop() {
	if s.cmd.Process == nil {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.ended:
	case <-time.After(10 * time.Second):
		_ = s.cmd.Process.Kill()
		<-s.ended
	}
	s.log.Close()
}

// usage is what a process has used.
type usage struct {
	cpu       time.Duration // in steps of 10 ms
	rss, peak int64         // bytes
}

func (s *server) usage() (usage, error) {
	var u usage
	proc := fmt.Sprintf("/proc/%d/", s.cmd.Process.Pid)
	b, err := os.ReadFile(proc + "stat")
	if err != nil {
		return u, err
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 13 {
		return u, errors.New(proc + "stat is not as expected")
	}
	for _, v := range f[11:13] { // utime, stime
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return u, err
		}
		u.cpu += time.Duration(n) * 10 * time.Millisecond
	}
	if b, err = os.ReadFile(proc + "status"); err != nil {
		return u, err
	}
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(line, ":")
		n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
		switch k {
		case "VmRSS":
			u.rss = n << 10
		case "VmHWM":
			u.peak = n << 10
		}
	}
	return u, nil
}

// profile writes one of the server's profiles (profile?seconds=10, heap?gc=1) to a
// file.
func (s *server) profile(ctx context.Context, what, file string) error {
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, s.profiles+what, nil)
	if err != nil {
		return err
	}
	r, err := http.DefaultClient.Do(q)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", q.URL, r.Status)
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r.Body)
	return errors.Join(err, f.Close())
}

// freePorts are of the loopback device, and free now.
func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // all are held until the last is found
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}
