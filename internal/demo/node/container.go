package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// container is one process of a pod, started again when it ends.
type container struct {
	pod     *pod
	spec    *corev1.Container
	sidecar bool
	init    bool

	mu       sync.Mutex
	cmd      *exec.Cmd
	ended    chan struct{} // of the process now running
	stopping bool
	started  bool // startup probe passed
	ready    bool
	restarts int32
	exit     *corev1.ContainerStateTerminated
}

// command is the process that stands for the container.
func (c *container) command() (*exec.Cmd, error) {
	argv := append([]string{}, c.spec.Command...)
	if len(argv) == 0 {
		image, _, _ := strings.Cut(c.spec.Image, ":")
		entry, ok := c.pod.node.Images[image]
		if !ok {
			return nil, fmt.Errorf("image %s: this node runs no containers, only the commands of images that it knows", c.spec.Image)
		}
		argv = append(argv, entry...)
	}
	env, err := c.environment()
	if err != nil {
		return nil, err
	}
	for _, a := range c.spec.Args {
		argv = append(argv, expand(a, env))
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = env
	cmd.Dir = "/"
	log, err := os.OpenFile(filepath.Join(c.pod.node.LogDir, c.pod.obj.Name+"."+c.spec.Name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	c.credentials(cmd.SysProcAttr)
	return cmd, nil
}

// credentials follows the security context: user, group, and the capabilities
// that a user other than root is given.
func (c *container) credentials(attr *syscall.SysProcAttr) {
	var uid, gid int64
	if s := c.pod.obj.Spec.SecurityContext; s != nil {
		uid, gid = value(s.RunAsUser, uid), value(s.RunAsGroup, gid)
	}
	s := c.spec.SecurityContext
	if s != nil {
		uid, gid = value(s.RunAsUser, uid), value(s.RunAsGroup, gid)
	}
	if uid == 0 && gid == 0 {
		return
	}
	attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	if s == nil || s.Capabilities == nil {
		return
	}
	for _, add := range s.Capabilities.Add {
		switch add {
		case "NET_ADMIN":
			attr.AmbientCaps = append(attr.AmbientCaps, unix.CAP_NET_ADMIN)
		case "NET_BIND_SERVICE":
			attr.AmbientCaps = append(attr.AmbientCaps, unix.CAP_NET_BIND_SERVICE)
		}
	}
}

func value(p *int64, or int64) int64 {
	if p == nil {
		return or
	}
	return *p
}

// launch starts the process; ended closes when it is gone.
func (c *container) launch() error {
	cmd, err := c.command()
	if err != nil {
		return err
	}
	err = c.pod.machine.Load().Start(cmd)
	cmd.Stdout.(*os.File).Close() // the process has its own by now
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	c.mu.Lock()
	c.cmd, c.ended = cmd, ended
	c.mu.Unlock()
	go func() {
		err := cmd.Wait()
		code := int32(cmd.ProcessState.ExitCode())
		c.mu.Lock()
		c.ready = false
		c.exit = &corev1.ContainerStateTerminated{ExitCode: code, FinishedAt: metav1.Now()}
		if err != nil {
			c.exit.Message = err.Error()
		}
		c.mu.Unlock()
		close(ended)
	}()
	return nil
}

// runOnce runs an init container to its end.
func (c *container) runOnce(ctx context.Context) error {
	if err := c.launch(); err != nil {
		return err
	}
	select {
	case <-c.ended:
	case <-ctx.Done():
		c.end(0)
		return ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.exit.ExitCode != 0 {
		return fmt.Errorf("%s (see its log in %s)", c.exit.Message, c.pod.node.LogDir)
	}
	c.started, c.ready = true, true
	return nil
}

// start keeps the process running, and probes it, until end.
func (c *container) start(ctx context.Context) {
	go func() {
		for {
			if err := c.launch(); err != nil {
				c.pod.node.Log.Error("could not start the container", "pod", c.pod.obj.Name, "container", c.spec.Name, "error", err)
				return
			}
			pctx, cancel := context.WithCancel(ctx)
			go c.probe(pctx)
			<-c.ended
			cancel()
			c.mu.Lock()
			stopping := c.stopping || ctx.Err() != nil
			c.started = false
			c.restarts++
			c.mu.Unlock()
			if stopping {
				return
			}
			time.Sleep(time.Second)
		}
	}()
}

func (c *container) waitStarted(ctx context.Context) error {
	for ctx.Err() == nil {
		c.mu.Lock()
		started := c.started
		c.mu.Unlock()
		if started {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return ctx.Err()
}

// end asks the process to stop, and kills it after the grace.
func (c *container) end(grace time.Duration) {
	c.mu.Lock()
	c.stopping = true
	cmd, ended := c.cmd, c.ended
	c.mu.Unlock()
	if cmd == nil {
		return
	}
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		c.pod.node.Log.Warn("could not stop the container", "container", c.spec.Name, "error", err)
	}
	select {
	case <-ended:
	case <-time.After(grace):
		_ = cmd.Process.Kill()
		<-ended
	}
}

func (c *container) status() corev1.ContainerStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	started := c.started
	st := corev1.ContainerStatus{Name: c.spec.Name, Image: c.spec.Image, ImageID: "local", Ready: c.ready, Started: &started, RestartCount: c.restarts}
	switch {
	case c.exit != nil && c.init && !c.sidecar:
		st.State.Terminated = c.exit
	case c.cmd == nil:
		st.State.Waiting = &corev1.ContainerStateWaiting{Reason: "PodInitializing"}
	default:
		st.State.Running = &corev1.ContainerStateRunning{}
	}
	return st
}
