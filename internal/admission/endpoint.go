package admission

import (
	"context"
	"errors"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/retry"
)

// Endpoint is where the API server finds the webhooks: at a URL (standalone), or a
// Service of the cluster. CABundle is PEM.
type Endpoint struct {
	URL      string // without a path: "https://127.0.0.1:15017"
	Service  *admissionregistrationv1.ServiceReference
	CABundle []byte
}

// ClientConfig is that of a webhook at a path.
func (e Endpoint) ClientConfig(path string) (admissionregistrationv1.WebhookClientConfig, error) {
	c := admissionregistrationv1.WebhookClientConfig{CABundle: e.CABundle}
	switch {
	case (e.URL == "") == (e.Service == nil):
		return c, errors.New("a webhook needs either a URL or a service")
	case e.URL != "":
		url := e.URL + path
		c.URL = &url
	default:
		c.Service = e.Service.DeepCopy()
		c.Service.Path = &path
	}
	return c, nil
}

// Configurations is a client of the webhook configurations of one kind.
type Configurations[T any] interface {
	Get(ctx context.Context, name string, o metav1.GetOptions) (T, error)
	Create(ctx context.Context, c T, o metav1.CreateOptions) (T, error)
	Update(ctx context.Context, c T, o metav1.UpdateOptions) (T, error)
}

const fieldManager = "isthmusd"

// Put makes a webhook configuration be there. Fresh is what is created; change makes
// one that exists say the same, and returns a copy.
func Put[T any](ctx context.Context, client Configurations[T], name string, fresh T, change func(T) T) error {
	retriable := func(err error) bool { return apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) }
	return retry.OnError(retry.DefaultBackoff, retriable, func() error {
		have, err := client.Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			_, err = client.Create(ctx, fresh, metav1.CreateOptions{FieldManager: fieldManager})
			return err
		}
		if err != nil {
			return err
		}
		_, err = client.Update(ctx, change(have), metav1.UpdateOptions{FieldManager: fieldManager})
		return err
	})
}

// Meta of a webhook configuration.
func Meta(name, component string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: name, Labels: map[string]string{
		"app.kubernetes.io/name": "isthmus", "app.kubernetes.io/component": component,
	}}
}
